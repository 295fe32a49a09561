"""Multi-process training: launch detection, Fabric from config, parallelism, collectives."""
