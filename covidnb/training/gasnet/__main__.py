"""Command line of a run of GASNet."""

from covidnb.training.gasnet import main

if __name__ == "__main__":
    main()
