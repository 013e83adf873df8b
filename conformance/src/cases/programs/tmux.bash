# A tmux server with a shell in it that counts: what it has counted to is on its screen, and its history is whole.
export SHELL=/bin/bash TERM=screen HOME=$PWD LC_ALL=C.UTF-8 TMUX_TMPDIR=$PWD
unset TMUX
tmux() { command tmux -S "$PWD/socket" -f /dev/null "$@"; }

fail() {
    echo "$1" > verdict
    tmux kill-server
    exit 1
}

# Waits until something is so.
until_so() {
    local tries
    for ((tries = 0; tries < 3000; tries++)); do
        "$@" && return
        sleep 0.02
    done
    return 1
}

# In the foreground, so that it stays in the tree.
command tmux -D -S "$PWD/socket" -f /dev/null &
server=$!
until_so test -S socket || fail "the server does not begin"
tmux new-session -d -s work -x 71 -y 9 'exec /bin/bash --norc --noprofile -i' || fail "no session"
tmux set-option -g history-limit 5000
is_seen() { tmux capture-pane -p -t work | grep -qx "$1"; }
# Nothing is typed ahead: a shell that begins or goes on to read may drop it.
until_so is_seen 'bash-.*[#$]' || fail "no prompt"
tmux send-keys -t work 'PS1="> "; word=before; tty > before; echo cat begins; cat' Enter
until_so is_seen 'cat begins' || fail "the shell does nothing"
tmux send-keys -t work 'typed to cat' Enter
# What was typed, and what cat said: then nothing more comes.
answers() { [ "$(tmux capture-pane -p -t work | grep -cx 'typed to cat')" = 2 ]; }
until_so answers || fail "cat does not answer"
# Without a child, which would be in the tree for a moment.
mkfifo silence
exec 9<> silence
: > ready
until [ -e go ]; do read -r -t 0.01 -u 9; done
# The interrupt goes to what is in the foreground: to cat, and not to the shell.
tmux send-keys -t work C-c
until_so is_seen '>' || fail "the interrupt does nothing"
tmux send-keys -t work 'tty > after; echo $word-and-after $COLUMNS' Enter
until_so is_seen 'before-and-after 71' || fail "the shell says: $(tmux capture-pane -p -t work)"
tmux send-keys -t work 'exec 2> end; exit 7' Enter
until_so test -e end || fail "the shell does not end"
cmp before after || fail "its terminal was $(cat before) and is $(cat after)"
is_over() { ! tmux has-session -t work 2> /dev/null; }
until_so is_over || fail "the server does not know that the shell has ended"
tmux kill-server
wait "$server" || fail "the server ended with $?"
echo pass > verdict
