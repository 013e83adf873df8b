// Threads that compute with checks, a garbage collector at work, and a timer; run from its source.
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;

public class Work {
    static void fail(String text) throws Exception {
        Files.writeString(Path.of("verdict"), text);
        System.exit(1);
    }

    public static void main(String[] arguments) throws Exception {
        var stop = new AtomicBoolean();
        var failures = new ConcurrentLinkedQueue<String>();
        var steps = new AtomicLong();
        var threads = new ArrayList<Thread>();
        for (int n = 0; n < 4; n++) {
            long seed = n;
            var thread = new Thread(() -> {
                long value = seed;
                long count = 0;
                var kept = new HashMap<Long, byte[]>();
                while (!stop.get()) {
                    value = value * 6364136223846793005L + 1442695040888963407L;
                    kept.put(count % 1000, new byte[(int) (value >>> 52)]);
                    count++;
                    steps.incrementAndGet();
                    if (count % 1000 == 0) java.util.concurrent.locks.LockSupport.parkNanos(1_000_000);
                }
                long again = seed;
                for (long step = 0; step < count; step++) again = again * 6364136223846793005L + 1442695040888963407L;
                if (again != value) failures.add("thread " + seed + " went wrong within " + count + " steps");
                if (kept.size() != Math.min(count, 1000)) failures.add("thread " + seed + " lost something");
            });
            threads.add(thread);
            thread.start();
        }
        var ticks = new AtomicInteger();
        var timer = Executors.newScheduledThreadPool(1);
        timer.scheduleAtFixedRate(ticks::incrementAndGet, 0, 5, TimeUnit.MILLISECONDS);
        while (steps.get() < 20000 || ticks.get() < 5) Thread.sleep(1);
        Files.writeString(Path.of("ready"), "");
        while (!Files.exists(Path.of("go"))) Thread.sleep(1);
        int before = ticks.get();
        while (ticks.get() < before + 5) Thread.sleep(1);
        System.gc();
        stop.set(true);
        for (var thread : threads) thread.join();
        timer.shutdown();
        if (!failures.isEmpty()) fail(String.join("; ", failures));
        System.out.println(steps + " steps");
        Files.writeString(Path.of("verdict"), "pass");
    }
}
