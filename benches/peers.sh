#!/usr/bin/env bash
# Fetches CRIU 4.1 from Debian trixie into .peers/ (ignored by git), without installing anything: ckpt-bench finds it there.
# It needs no root, but CRIU does.
set -euo pipefail
cd "$(dirname "$0")/.."

peers=$PWD/.peers
root=$peers/criu
packages=(criu libbsd0 libc6 libgnutls30t64 libnet1 libnftables1 libnl-3-200 libprotobuf-c1 libuuid1 libcompel1 libmd0
    libgcc-s1 libgmp10 libhogweed6t64 libidn2-0 libnettle8t64 libp11-kit0 libtasn1-6 libunistring5 libjansson4 libmnl0
    libnftnl11 libxtables12 libffi8)

# The address that this machine gets its own Debian packages from.
mirror() {
    local found
    found=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -v security | head -n 1)
    echo "${found:?no package source is set up on this machine}"
}

fetch() {
    local state=$peers/apt
    mkdir -p "$state"/{lists/partial,cache/archives/partial} "$root"
    echo "deb $(mirror) trixie main" > "$state/sources.list"
    local options=(-o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update -q
    (cd "$state" && apt-get "${options[@]}" download -q "${packages[@]}")
    local package
    for package in "$state"/*.deb; do
        dpkg -x "$package" "$root"
    done
}

if [ ! -x "$root/usr/sbin/criu" ]; then
    rm -rf "$root"
    fetch >&2
fi
"$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/usr/sbin/criu" --version
