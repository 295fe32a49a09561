"""`python -m tokengrow VERB ...`."""

from tokengrow.cli.main import main

if __name__ == "__main__":
    main()
