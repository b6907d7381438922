#!/usr/bin/env bash
# Trains and measures the hash weights that ship for one model. Needs no network; a GPU makes it minutes.
#
#   weights/train_shipped.sh MODEL TEXTS OUT [TOKENS] [BITS...]
#   weights/train_shipped.sh ./Qwen2.5-Coder-1.5B-Instruct ./texts ./out 28672
#
# MODEL is a Hugging Face folder; TEXTS holds train/ and evaluate/, whose every file is a text (weights/README.md names
# those that were used); BITS are 128 and 64 unless given. OUT gets a folder of weights for each, MODEL-BITS, and for
# each text and setting of sinks and recent tokens a table: .txt, .json, .png. A run that was cut off goes on when
# it is started again.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
model=${1%/} texts=${2%/} out=${3%/} tokens=${4:-8192}
shift $(($# < 4 ? $# : 4))
[ $# -gt 0 ] || set -- 128 64
name=$(basename "$model")
mkdir -p "$out"
hata_weights() {
  PYTHONPATH="$root/kernels:$root/weights${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -m hata_weights.cli "$@"
}
for bits; do
  weights=$out/$name-$bits
  if [ ! -e "$weights/hata.json" ]; then
    resume=()
    [ ! -e "$weights/partial/plan.json" ] || resume=(--resume)
    hata_weights train "$model" --text "$texts"/train/* --test "$texts"/evaluate/* --tokens "$tokens" --bits "$bits" \
      --out "$weights" "${resume[@]}"
  fi
  for text in "$texts"/evaluate/*; do
    for setting in "4 16" "0 0"; do
      read -r sink recent <<< "$setting"
      table=$out/$name-$bits-$(basename "${text%.*}")-$sink-$recent
      [ ! -e "$table.txt" ] || continue
      hata_weights eval "$model" --weights "$weights" --text "$text" --tokens "$tokens" --sink "$sink" --recent "$recent" \
        --out "$table.png" --out "$table.json" > "$table.unfinished"
      mv "$table.unfinished" "$table.txt"
    done
  done
done
