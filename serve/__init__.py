"""The sparse ensemble behind an OpenAI-compatible endpoint on Ray Serve."""
