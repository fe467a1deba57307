import sys

from gircse.cli import main

if __name__ == "__main__":
    sys.exit(main())
