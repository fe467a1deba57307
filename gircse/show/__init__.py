"""What people look at: text on a terminal and in HTML, tables, figures.

| file | what is in it |
|---|---|
| `escape.py` | any string as safe, visible text |
| `tables.py` | tables of plain text |
| `plots.py` | how figures are made and written |

Imports `files`.
"""
