"""`python -m hf_dspark_cli`: the same as the command `hf-dspark`."""

from hf_dspark_cli import main

if __name__ == "__main__":
    main()
