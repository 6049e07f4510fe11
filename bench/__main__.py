"""`python -m fastdistill.bench`."""

from fastdistill.bench.cli import app

if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench")
