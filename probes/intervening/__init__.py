"""Replace attention patterns or heads and measure how the loss changes."""
