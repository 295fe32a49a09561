"""The kernels room: how Pattention is computed."""
