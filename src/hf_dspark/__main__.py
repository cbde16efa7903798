"""`python -m hf_dspark`: the same as the command `hf-dspark`."""

from hf_dspark.cli import main

if __name__ == "__main__":
    main()
