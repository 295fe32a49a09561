"""The checkpoint room: what a training state looks like on disk, and how it gets there whole."""
