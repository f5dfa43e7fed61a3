"""The retention report as tables, HTML, and pictures."""
