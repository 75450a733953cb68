"""List the models: parameters, input size, published ImageNet top-1, and where weights are.

  saccade zoo
  saccade zoo 'davit_*'
  saccade zoo biformer_s --json

Exit codes: 0 done, 2 no model matches.
"""

import argparse
import json
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help="a name with wildcards, such as 'davit_*'")
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")
    args = parser.parse_args()

    import saccade.backbones  # noqa: F401  (registers the models)
    import timm
    from saccade.backbones import catalog

    ours = {name for names in catalog.families().values() for name in names}
    names = [name for name in timm.list_models(args.pattern) if name in ours]
    if not names:
        print(f"error: no model of saccade matches {args.pattern!r}: try 'biformer*', or no pattern", file=sys.stderr)
        return 2
    rows = []
    for name in names:
        model = timm.create_model(name, device="meta")
        cfg = timm.get_pretrained_cfg(name)
        published = catalog.published(name)
        rows.append(
            dict(
                name=name,
                parameters=sum(p.numel() for p in model.parameters()),
                input_size=list(cfg.input_size),
                top1=published and published.top1,
                weights=catalog.weights(name),
            )
        )
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'model':<28} {'params':>8} {'input':>9} {'top-1 %':>8}  weights")
    for row in rows:
        size = "×".join(map(str, row["input_size"][1:]))
        top1 = "–" if row["top1"] is None else f"{row['top1']:.1f}"
        print(f"{row['name']:<28} {row['parameters'] / 1e6:>6.1f} M {size:>9} {top1:>8}  {row['weights'] or '–'}")
    return 0
