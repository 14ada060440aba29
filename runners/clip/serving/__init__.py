"""CLIP as a service: requests of many users in one forward, on every device of a machine, by Ray Serve."""
