import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.HashMap;
import java.util.concurrent.atomic.AtomicLong;

// A server with a table in memory; it counts requests, and on request a thread stamps the time.
public class Server {
    static final HashMap<String, Integer> table = new HashMap<>();
    static final AtomicLong count = new AtomicLong();
    static volatile boolean stamping;
    static volatile long gap;

    static void stamp() {
        long last = System.nanoTime();
        while (stamping) {
            try {
                Thread.sleep(1);
            } catch (InterruptedException interrupted) {
                return;
            }
            long now = System.nanoTime();
            gap = Math.max(gap, now - last);
            last = now;
        }
    }

    static String answer(String path) throws Exception {
        switch (path) {
            case "/count":
                return String.valueOf(count.incrementAndGet());
            case "/sum":
                return String.valueOf(table.values().stream().mapToLong(Integer::longValue).sum());
            case "/stamp":
                gap = 0;
                stamping = true;
                new Thread(Server::stamp).start();
                return "ok";
            default:
                Thread.sleep(5);
                stamping = false;
                return String.valueOf(gap);
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (int key = 0; key < 200000; key++) {
            table.put("key " + key, key);
        }
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(arguments[0])), 0);
        server.createContext("/", exchange -> {
            byte[] body;
            try {
                body = answer(exchange.getRequestURI().getPath()).getBytes();
            } catch (Exception failed) {
                throw new java.io.IOException(failed);
            }
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
    }
}
