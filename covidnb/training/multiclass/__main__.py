"""Command line of a run on classes."""

from covidnb.training.multiclass import main

if __name__ == "__main__":
    main()
