"""Write a finished run as a folder for the Hugging Face Hub, with a model card, and upload it.

  saccade publish runs/pets ada/pets-biformer --license apache-2.0
  saccade publish runs/pets ada/pets-biformer --license apache-2.0 --to hub/pets      a folder only, without a network
  saccade publish runs/scenes/detector ada/digits-detector --license cc-by-4.0 --private

A classifier's folder is timm's: timm.create_model("hf-hub:ada/pets-biformer", pretrained=True). A detector's or
segmenter's is a run's, which `saccade predict` reads. Lifters of several cameras are refused. README.md has metrics,
config (without folders of this machine), data, licence and an example, which is run and compared with the run's own
result first.

Exit codes: 0 done, 2 an error to fix (one sentence says what), 74 a file could not be written.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("repo", help="the repository: user/name")
    parser.add_argument("--license", required=True, help="of the weights, as the Hub names it: apache-2.0, cc-by-4.0")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write this folder, and upload nothing")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    args = parser.parse_args()

    from saccade.train.publish import publish  # here, so that --help answers at once

    where, files = publish(args.run, args.repo, args.license, args.to, args.private)
    print(f"the example in README.md runs and gives the run's result: {where}")
    for file in files:
        print(f"  {file}")


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
