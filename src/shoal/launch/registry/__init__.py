"""Who is alive and what counts, where hosts come and go: one store decides, all others read."""
