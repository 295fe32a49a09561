"""Number formatting, tables and progress displays on a terminal."""
