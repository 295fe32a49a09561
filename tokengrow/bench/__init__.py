"""The bench room: how fast it is here, beside its peers and the limit."""
