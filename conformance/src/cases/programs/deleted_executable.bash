# Runs from a file that is gone, and goes on to see it as it was.
rm shell
before=$(readlink /proc/$$/exe)
judge() {
    [[ $before == "$PWD/shell (deleted)" ]] || { echo "the script is wrong: it runs from $before"; return; }
    local now=$(readlink /proc/$$/exe)
    [[ $now == "$before" ]] || { echo "the executable was $before, is $now"; return; }
    [[ ! -e shell ]] || { echo "the file is there again"; return; }
    cmp "/proc/$$/exe" /bin/bash || { echo "the executable has another content"; return; }
    # A new program from the file that has no name.
    [[ $("/proc/$$/exe" -c 'echo $((6 * 7))') == 42 ]] || { echo "the executable does not run"; return; }
    echo pass
}
# To wait without another process.
mkfifo nobody
exec 3<> nobody
: > ready
until [[ -e go ]]; do
    read -r -t 0.01 -u 3
done
verdict=$(judge 2>&1)
echo "$verdict" > verdict
[[ $verdict == pass ]]
