"""Compositions such as `medicine+legal`: planning, building, caching and saving them, routing and generating."""
