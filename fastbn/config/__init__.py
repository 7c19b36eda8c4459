"""What is this machine and what does its user ask for? The environment, threads, caches, and what was installed."""
