"""The distributed room: Fabric from config."""
