"""The models: what travels to the Hub as remote code."""
