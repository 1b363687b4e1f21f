"""Pictures for the terminal, made of characters."""
