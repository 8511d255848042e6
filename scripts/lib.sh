# Sourced by the scripts beside it. Decides where the Python environment is and when it is up to date; afterwards
# ROOT is the checkout, PYTHON its interpreter, and the working directory is ROOT.
#
#   prepare_environment        what serving needs
#   prepare_environment dev    that, and what tests and checks need

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"
cd "$ROOT"

# The pinned torch goes in first and by itself: pip then keeps the build it finds (a CPU build on a machine without
# GPUs) and later resolves everything else around it.
TORCH="$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml)"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, and python3 is $(python3 --version 2>&1 || true)"
}

make_venv() {
    local base version
    base="$(find_python)"
    version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv (or python$version-venv)"
    say "making $ROOT/.venv with Python $version"
    "$base" -m venv "$ROOT/.venv"
}

pip_install() {
    say "  pip install $*"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

# A stamp holds the hash of pyproject.toml that the environment was last brought up to; the one of dev covers both sets.
prepare_environment() {
    local group="${1:-}" stamps wanted
    stamps="$ROOT/.venv/.installed"
    wanted="$(sha256sum pyproject.toml | cut -d' ' -f1)"
    [ -x "$PYTHON" ] || make_venv
    if grep -qsx "$wanted" "$stamps-dev" || { [ -z "$group" ] && grep -qsx "$wanted" "$stamps"; }; then
        return
    fi
    say "installing into $ROOT/.venv (the first time takes some minutes)"
    pip_install --upgrade 'pip>=25.1'
    pip_install "$TORCH"
    pip_install --editable . ${group:+--group "$group"}
    echo "$wanted" >"$stamps${group:+-$group}"
}
