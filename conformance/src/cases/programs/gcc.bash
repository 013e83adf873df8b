# A program of some 10,000 lines is built by make and gcc, two of its files at a time, once undisturbed and once while it is
# dumped and restored: the same bytes have to come of it, and they have to run.
fail() {
    echo "$1" > verdict
    exit 1
}

generate() {
    awk -v file="$1" 'BEGIN {
        print "/* Generated. */"
        print "static const unsigned table[1200] = {"
        for (n = 0; n < 1200; n++) printf "    %du,\n", (n * 7919 + file) % 65521
        print "};"
        for (n = 0; n < 30; n++) {
            printf "__attribute__((noinline)) static unsigned long step_%d(unsigned long value, unsigned turns) {\n", n
            print  "    for (unsigned turn = 0; turn < turns; turn++) {"
            for (line = 0; line < 8; line++)
                printf "        value = value * %dul + table[(value >> %d) %% 1200];\n", 6364136 + file * 1000 + n * 2 + 1, (n + line) % 50
            print  "    }"
            print  "    return value;"
            print  "}"
            print  ""
        }
        printf "unsigned long all_of_%d(unsigned long value) {\n", file
        for (n = 0; n < 30; n++) printf "    value = step_%d(value, %d);\n", n, n % 11 + 5
        print "    return value;"
        print "}"
    }'
}

build() {
    local number
    mkdir "$1"
    for ((number = 0; number < files; number++)); do generate "$number" > "$1/part$number.c"; done
    {
        echo '#include <stdio.h>'
        for ((number = 0; number < files; number++)); do echo "unsigned long all_of_$number(unsigned long);"; done
        echo 'int main(void) { unsigned long value = 1;'
        for ((number = 0; number < files; number++)); do echo "    value = all_of_$number(value);"; done
        echo '    printf("%lx\n", value); return 0; }'
    } > "$1/main.c"
    printf '%s\n' 'parts := $(patsubst %.c,%.o,$(sort $(wildcard *.c)))' \
        'program: $(parts)' $'\tgcc -o $@ $(parts)' \
        '%.o: %.c' $'\tgcc -O2 -c -o $@ $<' > "$1/Makefile"
    make -s -j2 -C "$1" || fail "make ended with $?"
}

files=6
build undisturbed
: > ready
build disturbed
: > built
mkfifo silence
exec 9<> silence
until [ -e go ]; do read -r -t 0.01 -u 9; done
for file in undisturbed/*; do cmp "$file" "disturbed/${file#*/}" || fail "$file is not what it was"; done
[ "$(disturbed/program)" = "$(undisturbed/program)" ] || fail "it computes $(disturbed/program)"
lines=$(cat disturbed/*.c | wc -l)
[ "$lines" -gt 9000 ] || fail "it has but $lines lines"
echo pass > verdict
