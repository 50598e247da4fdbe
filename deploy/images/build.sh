#!/usr/bin/env bash
# Build images without a registry: deploy/images/build.sh [IMAGE...]; all but the GPU's by default.
# The base is Debian with Python, made by debootstrap. IMAGE_FLAGS goes to buildah, as
# `-v /wheels:/wheels:ro` where pip is to find wheels of one's own.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
base=localhost/isentrope-base:bookworm
if [ $# -gt 0 ]; then images=("$@"); else images=(verifier engine-cpu); fi

for tool in buildah debootstrap runc; do
  command -v "$tool" >/dev/null || {
    echo "error: $tool: not found; on Debian: apt-get install buildah debootstrap runc" >&2
    exit 1
  }
done
[ "$(id -u)" = 0 ] || { echo "error: debootstrap and chroot isolation need root" >&2; exit 1; }

export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs

make_base() {
  local folder container
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' RETURN
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder" >&2
  rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
  container=$(buildah from scratch)
  buildah copy --quiet "$container" "$folder" / >/dev/null
  buildah commit --quiet --rm "$container" "$base"
}

# Where a proxy answers with a certificate of its own, pip in the build needs this machine's.
pip_flags=(-v /etc/ssl/certs:/etc/ssl/certs:ro)
read -r -a more_flags <<< "${IMAGE_FLAGS:-}"

buildah inspect --type image "$base" >/dev/null 2>&1 || make_base
for image in "${images[@]}"; do
  tag=${image%-*}:$version${image#"${image%-*}"}
  buildah bud --network host "${pip_flags[@]}" "${more_flags[@]}" \
    --build-arg BASE_IMAGE="$base" --file "deploy/images/$image.Dockerfile" \
    --tag "isentrope/$tag" .
  container=$(buildah from "isentrope/$tag")
  # What a service imports before it does anything; `--help` imports next to nothing.
  for service in $([ "$image" = verifier ] && echo verifier || echo learner rollout); do
    buildah run "$container" -- env HOME=/tmp python -c "import services.$service.app" >/dev/null
  done
  user=$(buildah inspect --type image --format '{{.OCIv1.Config.User}}' "isentrope/$tag")
  echo "isentrope/$tag: user $user, $(du -shx "$(buildah mount "$container")" | cut -f1)"
  buildah rm "$container" >/dev/null
done
