"""How each model family writes tool calls, one file per family; families.py lists them."""
