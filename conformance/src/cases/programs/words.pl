# Counts words in hashes, talks with a child through two pipes, handles signals of a timer, and writes a file, until it
# is told to stop; then everything must add up.
use strict;
use warnings;
use Time::HiRes qw(setitimer ITIMER_REAL usleep);

sub fail { open(my $out, '>', 'verdict'); print $out @_; close $out; exit 1 }

pipe(my $child_in, my $to_child) or die;
pipe(my $from_child, my $child_out) or die;
my $child = fork() // die;
if (!$child) {
    # The child answers each word with its letters sorted.
    close $to_child;
    close $from_child;
    select((select($child_out), $| = 1)[0]);
    while (my $word = <$child_in>) {
        chomp $word;
        print $child_out join('', sort split //, $word), "\n";
    }
    exit 7;
}
close $child_in;
close $child_out;
select((select($to_child), $| = 1)[0]);

my $ticks = 0;
$SIG{ALRM} = sub { $ticks++ };
setitimer(ITIMER_REAL, 0.01, 0.01);

open(my $log, '>', 'words.log') or die;
my (%count, $rounds);
my $ticks_at_ready;
until (-e 'go') {
    $rounds++;
    my $word = join '', map { chr(97 + ($rounds * 7 + $_ * 13) % 26) } 1 .. 12;
    print $to_child "$word\n";
    my $answer = <$from_child>;
    fail("the child is gone in round $rounds") unless defined $answer;
    chomp $answer;
    my $expected = join '', sort split //, $word;
    fail("round $rounds: expected $expected, found $answer") if $answer ne $expected;
    $count{$word}++;
    print $log "$rounds $word\n";
    if ($rounds == 500) {
        open(my $ready, '>', 'ready');
        close $ready;
        $ticks_at_ready = $ticks;
    }
}
my $ticks_at_go = $ticks;
for (1 .. 3000) { last if $ticks > $ticks_at_go; usleep(1000) }
fail("the timer stands still at $ticks ticks") if $ticks == $ticks_at_go;
setitimer(ITIMER_REAL, 0);

close $to_child;
waitpid($child, 0) == $child or fail("the child is not there to wait for: $!");
fail("the child ended with status $?") if $? != 7 << 8;
close $log;
my $sum = 0;
$sum += $_ for values %count;
fail("$rounds words were counted as $sum") if $sum != $rounds;
open(my $again, '<', 'words.log') or fail("words.log: $!");
my $line = 0;
while (<$again>) {
    $line++;
    fail("line $line of the log is $_") unless /^$line [a-z]{12}$/;
}
fail("$rounds lines were written, $line are there") if $line != $rounds;
open(my $out, '>', 'verdict');
print $out 'pass';
close $out;
