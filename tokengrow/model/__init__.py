"""The model room: what a TokenFormer is. Single-device modules; no I/O, no Lightning, no Hydra."""
