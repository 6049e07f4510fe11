"""`python -m fastdistill` is the command `fastdistill`."""

from fastdistill.cli import main

main()
