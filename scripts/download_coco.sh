#!/usr/bin/env bash
# Download COCO 2014 (photos and captions) with resume and checksums.
#
#   scripts/download_coco.sh FOLDER [train2014] [val2014] [annotations_trainval2014]
#   scripts/download_coco.sh --dry-run FOLDER [...]
#
# Without names it downloads all three: 20 GB, and 41 GB of disk while unpacking. After an
# interruption the same command resumes. Each archive is checked before it is unpacked, and removed
# afterwards. --dry-run only lists the archives. COCO_BASE_URL names another mirror, COCO_CHECKSUMS
# a file of "md5 size path" lines to use instead of the table below.
set -euo pipefail

# The MD5 sums are COCO's own ETags, which many projects publish. The sizes are in bytes.
checksums() {
    if [ -n "${COCO_CHECKSUMS:-}" ]; then
        cat "$COCO_CHECKSUMS"
        return
    fi
    cat <<'TABLE'
0da8c0bd3d6becc4dcb32757491aca88 13510573713 zips/train2014.zip
a3d79f5ed8d289b7a7554ce06a5782b3 6645013297 zips/val2014.zip
0a379cfc70b0e71301e0f377548639bd 252872794 annotations/annotations_trainval2014.zip
TABLE
}

fail() {
    echo "error: $*" >&2
    exit 1
}

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit "$1"
}

fetch() { # URL FILE: resumes at the end of FILE
    if command -v curl >/dev/null; then
        curl --fail --location --retry 5 --retry-delay 2 --continue-at - --output "$2" "$1"
    elif command -v wget >/dev/null; then
        wget --continue --tries=5 --output-document="$2" "$1"
    else
        fail "neither curl nor wget is installed"
    fi
}

unpack() { # ARCHIVE FOLDER
    if command -v unzip >/dev/null; then
        unzip -q -o "$1" -d "$2"
    else
        python3 -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])' \
            "$1" "$2"
    fi
}

dry_run=
case "${1:-}" in
    -h | --help) usage 0 ;;
    --dry-run)
        dry_run=1
        shift
        ;;
esac
[ $# -ge 1 ] || usage 2 >&2
folder=$1
shift
base=${COCO_BASE_URL:-http://images.cocodataset.org}
table=$(checksums)
names=("$@")
if [ $# -eq 0 ]; then
    mapfile -t names < <(awk '{n = $3; sub(".*/", "", n); sub("[.]zip$", "", n); print n}' <<<"$table")
fi

for name in "${names[@]}"; do
    read -r md5 size path < <(grep "/$name\.zip\$" <<<"$table" || true) || true
    [ -n "${path:-}" ] || fail "no archive $name; choose from train2014, val2014, annotations_trainval2014"
    archive="$folder/$name.zip" part="$folder/$name.zip.part" marker="$folder/.$name.done"
    if [ -e "$marker" ]; then
        echo "$name: already done" >&2
        continue
    fi
    if [ -n "$dry_run" ]; then
        echo "$base/$path -> $folder ($size bytes, md5 $md5)"
        continue
    fi
    mkdir -p "$folder" || fail "$folder: cannot create the folder"
    have=$(stat -c %s "$part" 2>/dev/null || stat -c %s "$archive" 2>/dev/null || echo 0)
    free=$(($(df --output=avail -B1 "$folder" | tail -n 1)))
    # The rest of the archive, and as much as the whole archive again for its contents.
    needed=$((size - have + size))
    [ "$free" -gt "$needed" ] || fail "$folder: $name needs $((needed / 1000000)) MB, but only $((free / 1000000)) MB are free"
    if [ ! -e "$archive" ]; then
        echo "$name: downloading $((size / 1000000)) MB from byte $have" >&2
        if [ "$have" -lt "$size" ]; then
            fetch "$base/$path" "$part" || fail "$name: the download stopped; run the same command to resume"
        fi
        mv "$part" "$archive"
    fi
    echo "$name: checking the MD5 sum" >&2
    found=$(md5sum "$archive" | cut -d ' ' -f 1)
    if [ "$found" != "$md5" ]; then
        rm -f "$archive"
        fail "$name: md5 is $found, expected $md5; the archive was removed, run the same command again"
    fi
    echo "$name: unpacking" >&2
    unpack "$archive" "$folder"
    touch "$marker"
    rm -f "$archive"
    echo "$name: done" >&2
done
