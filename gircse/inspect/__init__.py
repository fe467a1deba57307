"""Looking at soft tokens: `GIRCSE.inspect` and `gircse inspect`.

    soft_tokens.py   `inspect`: per text and step the top tokens, entropy and movement
    failures.py      the signs of failure and their thresholds
    table.py         the result as text for the terminal
    page.py          the result as one HTML page
    page_style.py    its style sheet and script

Imports `gircse.encode`, `gircse.lm`, `gircse.show` and what is below them.
"""
