# A pipeline in the middle of its data: numbers are made, get a running check sum, are compressed and unpacked, and every
# line is checked at the end. The last process is the slowest, so that every pipe is full when it is dumped.
set -o pipefail

produce() {
    local number=0
    until [ -e go ]; do
        number=$((number + 1))
        echo "$number"
    done
    echo "end $number"
}

check() {
    local number=0 sum=0 word check_sum
    while read -r word check_sum; do
        if [ "$word" = end ]; then
            [ "$check_sum" = "$number" ] || { echo "ended after $number of $check_sum numbers"; return 1; }
            echo "$number numbers came through"
            return 0
        fi
        number=$((number + 1))
        sum=$(((sum * 31 + number) % 1000003))
        if [ "$word" != "$number" ] || [ "$check_sum" != "$sum" ]; then
            echo "line $number with sum $sum was expected, $word with $check_sum found"
            return 1
        fi
        [ "$number" -eq 2000 ] && : > ready
    done
    echo "the data ended after $number numbers"
    return 1
}

if produce | awk '$1 == "end" { print; exit } { sum = (sum * 31 + $1) % 1000003; print $1, sum }' |
    gzip -1 -c | gunzip -c | check > result; then
    cat result
    echo pass > verdict
else
    cp result verdict
    exit 1
fi
