#!/usr/bin/env bash
# Build the container of docs/container, run it as its README says, caption a photo and stop it.
#
#   scripts/try_container.sh MODEL PHOTO
#
# MODEL: a folder with a .cap file and the backbone's weights. Where there is a container engine
# (docker), it builds and runs. Elsewhere, as root, every step of the Dockerfile runs in a copy of
# this system, which is thrown away: only what `FROM` would download is this system's own, its
# Python for one. The build installs PyTorch: some GB and some minutes.
#
# Variables: PORT (8765), TORCH_INDEX (of the Dockerfile).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# != 2 ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' scripts/try_container.sh >&2
    exit 2
fi
model=$(realpath "$1") photo=$(realpath "$2") port=${PORT:-8765}
file=docs/container/Dockerfile

# usage: ask
# Waits until the server answers, then asks for its health and a caption.
ask() {
    for _ in $(seq 240); do
        curl --silent --fail "http://127.0.0.1:$port/healthz" >/dev/null && break
        sleep 0.5
    done
    curl --silent --show-error --fail "http://127.0.0.1:$port/healthz"
    echo
    curl --silent --show-error --fail --form "file=@$photo" "http://127.0.0.1:$port/caption"
    echo
}

if docker info >/dev/null 2>&1; then
    docker build --file "$file" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" --tag cap-serve .
    docker run --detach --name cap-serve-try --read-only --cap-drop ALL \
        --security-opt no-new-privileges --publish "127.0.0.1:$port:8000" \
        --volume "$model:/model:ro" cap-serve
    trap 'docker logs cap-serve-try; docker rm --force cap-serve-try' EXIT
    ask
    docker stop --time 10 cap-serve-try
    [ "$(docker inspect --format '{{.State.ExitCode}}' cap-serve-try)" = 0 ]
    echo "the container was built, captioned the photo and stopped with exit code 0"
    exit
fi

if [ "$(id -u)" != 0 ]; then
    echo "no container engine answers, and without one this script needs root" >&2
    exit 1
fi
# Mounts of this script are seen by no other process, and end with it.
[ "${CAP_TRY_ALONE:-}" ] || CAP_TRY_ALONE=1 exec unshare --mount "$0" "$@"

work=$(mktemp -d) server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; cd /; umount -l "$work"/*/root 2>/dev/null || true; rm -rf "$work"' EXIT

# usage: new_stage NAME
# A writable copy of this system for a stage, at $root.
new_stage() {
    root=$work/$1/root folder=/
    mkdir -p "$work/$1"/{upper,scratch,root}
    mount -t overlay overlay -o "lowerdir=/,upperdir=$work/$1/upper,workdir=$work/$1/scratch" "$root"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    # Of this system's Python, which may lie where only root looks.
    local path
    path=$(realpath "$(command -v python3)")
    while [ "$path" != / ]; do
        chmod o+x "$root$path"
        path=$(dirname "$path")
    done
}

# usage: enter COMMAND…
# Becomes a command in the stage, with its variables and those that reach a package registry.
enter() {
    exec env -i "PATH=$PATH" ${PIP_FIND_LINKS:+"PIP_FIND_LINKS=$PIP_FIND_LINKS"} \
        ${HTTPS_PROXY:+"HTTPS_PROXY=$HTTPS_PROXY"} ${SSL_CERT_FILE:+"SSL_CERT_FILE=$SSL_CERT_FILE"} \
        "TORCH_INDEX=${TORCH_INDEX:-}" "${variables[@]}" \
        chroot "$root" sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
}

# usage: inside COMMAND…
inside() {
    (enter "$@")
}

stage=0 user=0 variables=("X=") entry=()
while IFS= read -r line; do
    read -r word rest <<<"$line"
    case $word in
    '' | '#'*) continue ;;
    esac
    echo "$line" >&2
    case $word in
    FROM)
        stage=$((stage + 1))
        new_stage "$stage"
        ;;
    ARG | EXPOSE | HEALTHCHECK) ;; # of the engine; what HEALTHCHECK asks is asked below
    WORKDIR)
        folder=$rest
        mkdir -p "$root$folder"
        ;;
    COPY)
        if [ "$rest" = ". ." ]; then
            sed -n 's/^!//p' "$file.dockerignore" | xargs git ls-files -z -- |
                tar --create --null --files-from - | tar --extract --directory "$root$folder"
        else
            read -r _ from to <<<"$rest" # --from=build, the first stage
            mkdir -p "$root$to"
            mount --bind "$work/1/root$from" "$root$to"
        fi
        ;;
    RUN) inside sh -c "$rest" ;;
    ENV)
        eval "variables+=(\"$rest\")" # in which $PATH is this system's
        ;;
    USER) user=$rest ;;
    ENTRYPOINT) mapfile -t entry < <(python3 -c 'import json, sys; print(*json.loads(sys.argv[1]), sep="\n")' "$rest") ;;
    *)
        echo "$file: this script does not know $word" >&2
        exit 1
        ;;
    esac
done < <(sed -e ':a' -e '/\\$/N; s/\\\n//; ta' "$file")

# As `docker run` is told to: the model, nothing to write to, no rights, and another port here.
mkdir -p "$root/model"
mount --bind "$model" "$root/model"
mount -o remount,ro,bind "$root/model"
mount -o remount,ro "$root"
entry=("${entry[@]/8000/$port}")
enter setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --bounding-set=-all \
    --inh-caps=-all "${entry[@]}" &
server=$!
if inside setpriv --reuid "$user" --clear-groups --regid "$user" touch /tmp/x 2>/dev/null; then
    echo "the file system can be written" >&2
    exit 1
fi
ask
kill -TERM "$server"
wait "$server"
server=
echo "every step ran, the photo was captioned, and the server stopped with exit code 0"
