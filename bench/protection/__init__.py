"""What bench/colo.py is made of: a pair of VMMs that make checkpoints, and what is read from them."""
