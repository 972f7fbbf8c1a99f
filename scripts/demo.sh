#!/bin/sh
# The whole path on one machine; `make demo` calls it. Everything it makes lies under demo/.
#
#   scripts/demo.sh BIN WORKERS EPOCHS [FILE.pkl]
#
# BIN is the environment's folder of programs. Without FILE.pkl, data the size of MOSI is generated.
set -eu

PATH="$(cd "$1" && pwd):$PATH"
workers=$2
epochs=$3
data=${4:-}
# An absolute path: the Ray workers do not run in this folder.
MLFLOW_TRACKING_URI="sqlite:///$PWD/demo/mlflow.db"
export PATH MLFLOW_TRACKING_URI

# bold headings for a reader at a terminal, plain ones in a log
if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); else bold='' plain=''; fi
run() {
    printf '\n%s$ %s%s\n' "$bold" "$*" "$plain"
    "$@"
}

mkdir -p demo
rm -f demo/predictions.csv # runs and registered models of earlier demos stay

if [ -n "$data" ]; then
    run mmsa-dist pack mmsa "$data" --out demo/shards --overwrite
else
    run mmsa-dist pack generated --like mosi --out demo/shards --overwrite
fi
run mmsa-dist inspect demo/shards
run mmsa-dist train ufen_mtfn --data demo/shards --runs-dir demo/runs \
    --workers "$workers" --zero 2 --epochs "$epochs" --register ufen_mtfn --alias champion
run mmsa-dist predict models:/ufen_mtfn@champion --data demo/shards --split test --out demo/predictions.csv
run head -n 4 demo/predictions.csv

cat <<END

Done. What to do next:

  the runs, the model and its versions in a browser (http://127.0.0.1:5000, half a minute after the start):
    $1/mlflow ui --workers 1 --backend-store-uri $MLFLOW_TRACKING_URI

  other formats, longer training, more machines: README.md and docs/your-data.md
END
[ -n "$data" ] || cat <<END

  the same on your own MMSA features:
    make demo DATA=path/to/MOSI/Processed/unaligned_50.pkl

The data was generated: losses go down, but the metrics say nothing about real sentiment.
END
