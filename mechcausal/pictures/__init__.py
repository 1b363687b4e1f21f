"""Every picture: `static` for papers, `interactive` for notebooks, `pages`, `terminal`."""
