#!/usr/bin/env bash
# Makes a Python for aarch64 that runs in an emulated CPU, of Debian's or Ubuntu's packages.
#
#   bash tools/machines/aarch64_python.sh FOLDER [PACKAGE...]
#
# FOLDER/python then runs it; each PACKAGE is installed for it from its aarch64 wheel. Headers are
# in FOLDER/root/usr/include. Nothing else on the machine changes, and a folder that holds the
# Python already is used again. Needs apt-get, dpkg-deb, qemu-user, and pip in ZSSEG_PYTHON
# (default: python3). The machine's package sources must hold arm64, as Debian's do.
# Exit code 4: a part is missing.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
if [ $# = 0 ] || [[ $1 == -* ]]; then
  echo "Usage: bash tools/machines/aarch64_python.sh FOLDER [PACKAGE...]" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
root=$folder/root
packages=("${@:2}")
host=${ZSSEG_PYTHON:-python3}

for tool in apt-get dpkg-deb qemu-aarch64 "$host"; do
  if ! command -v "$tool" >/dev/null; then
    echo "Missing: $tool. It runs on Debian and Ubuntu, with qemu-user installed." >&2
    exit 4
  fi
done

apt() { # words of apt-get, as a machine of its own that has nothing installed
  local state=$folder/apt
  mkdir -p "$state"/{lists,archives}/partial
  touch "$state/status"
  apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$state" \
    -o Dir::State::status="$state/status" -o Dir::Cache="$state" -o APT::Sandbox::User= "$@"
}

if ! ls "$root"/usr/bin/python3.* >/dev/null 2>&1; then
  apt update >/dev/null || true # a source may lack arm64; the next line says if all do
  apt install --download-only --yes --no-install-recommends python3 libstdc++6 >/dev/null
  (cd "$folder/apt/archives" && apt download "$(basename -a python3.*.deb |
    sed -nE 's/^(python3\.[0-9]+)_.*/lib\1-dev/p')" >/dev/null)
  for archive in "$folder"/apt/archives/*.deb; do
    dpkg-deb -x "$archive" "$root"
  done
  rm -rf "$folder/apt"
fi

python=$(basename "$(ls "$root"/usr/bin/python3.*[0-9])")
cat >"$folder/python" <<END
#!/usr/bin/env bash
# Made by tools/machines/aarch64_python.sh.
export PYTHONHOME='$root/usr' PYTHONPATH="\${PYTHONPATH:+\$PYTHONPATH:}$folder/site"
exec qemu-aarch64 -L '$root' '$root/usr/bin/$python' "\$@"
END
chmod +x "$folder/python"

if [ ${#packages[@]} -gt 0 ]; then
  wheels=(--only-binary=:all: --implementation cp --python-version "${python#python}")
  for glibc in 2014 _2_17 _2_24 _2_26 _2_27 _2_28 _2_31 _2_34 _2_35; do
    wheels+=(--platform "manylinux${glibc}_aarch64")
  done
  "$host" -m pip install -q --disable-pip-version-check --no-compile --upgrade \
    --target "$folder/site" "${wheels[@]}" "${packages[@]}"
fi
"$folder/python" -c 'import platform; print(platform.python_version(), platform.machine())'
