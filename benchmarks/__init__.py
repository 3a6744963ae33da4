"""Speed of autopar against hand-written parallelism."""
