"""`python3 -m rollout`."""

from rollout.cli import run

if __name__ == "__main__":
    run()
