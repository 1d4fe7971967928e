#!/usr/bin/env bash
# Unpacks a Debian Python with the libraries it needs into a folder, for this or another machine.
# Nothing is installed: the folder is a root to give to an emulator, or to run by its own loader.
#
#   bash tools/machines/debian_python.sh SUITE MACHINE FOLDER      such as: trixie aarch64 build/trixie
#
# Prints the Python's path. Takes packages from where this Debian takes them. Exit codes: 0 there,
# 1 something failed, 4 this is no Debian.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac

if [ $# != 3 ] || [[ $1 == -* ]]; then
  echo "Usage: bash tools/machines/debian_python.sh SUITE MACHINE FOLDER" >&2
  exit 2
fi
suite=$1 folder=$(realpath -m "$3")
case $2 in
  x86_64) machine=amd64 ;;
  aarch64) machine=arm64 ;;
  *) echo "debian_python: MACHINE: expected x86_64 or aarch64, got $2" >&2 && exit 1 ;;
esac
keys=/usr/share/keyrings/debian-archive-keyring.gpg
if ! command -v apt-get >/dev/null || [ ! -e "$keys" ]; then
  echo "debian_python: expected Debian's apt-get and its keys, got none. Run it on Debian." >&2
  exit 4
fi

if [ ! -e "$folder/complete" ]; then
  rm -rf "$folder"
  mkdir -p "$folder"/apt/{lists/partial,archives/partial} "$folder/root"
  # shellcheck disable=SC2016  # the names are apt's
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(SUITE) $(CODENAME)' 2>/dev/null |
    awk '$3 ~ /^[a-z]+$/ && $1 ~ /debian\/?$/ {print $1; exit}')
  echo "deb [signed-by=$keys] ${mirror:?this Debian has no mirror: run apt-get update} $suite main" \
    >"$folder/apt/sources.list"
  : >"$folder/apt/status"
  options=(-q -o "APT::Architecture=$machine" -o "APT::Architectures=$machine"
    -o "Dir::Etc::SourceList=$folder/apt/sources.list" -o Dir::Etc::SourceParts=-
    -o "Dir::State::Lists=$folder/apt/lists" -o "Dir::State::status=$folder/apt/status"
    -o "Dir::Cache=$folder/apt" -o APT::Sandbox::User=root -o Acquire::Languages=none)
  apt-get "${options[@]}" update >&2
  apt-get "${options[@]}" install -y --download-only --no-install-recommends \
    python3 python3-venv libpython3-dev libstdc++6 libgcc-s1 >&2
  # Newer Debians have /bin and /lib as links into /usr, and their packages take that for granted.
  for link in bin sbin lib lib64; do
    mkdir -p "$folder/root/usr/$link"
    ln -s "usr/$link" "$folder/root/$link"
  done
  for package in "$folder"/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar x -C "$folder/root" --keep-directory-symlink
  done
  # The header of Python's that differs between machines is elsewhere; put it where others look.
  for header in "$folder"/root/usr/include/*-linux-gnu/python3.*/pyconfig.h; do
    cp "$header" "$folder/root/usr/include/$(basename "$(dirname "$header")")/"
  done
  rm -rf "$folder/apt"
  touch "$folder/complete"
fi
python=("$folder"/root/usr/bin/python3.*[0-9])
echo "${python[0]}"
