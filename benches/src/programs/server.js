// A server with a table in memory; it counts requests, and on request stamps the time.
const table = new Map();
for (let key = 0; key < 200000; key++) table.set(`key ${key}`, { key, text: `the object of key ${key}` });
let count = 0, gap = 0n, last = null, timer = null;
const stamp = () => {
  const now = process.hrtime.bigint();
  if (last !== null && now - last > gap) gap = now - last;
  last = now;
};
const answers = {
  '/count': () => ++count,
  '/sum': () => [...table.values()].reduce((sum, value) => sum + value.key, 0),
  '/stamp': () => { gap = 0n; last = null; timer = setInterval(stamp, 1); return 'ok'; },
  '/gap': () => { stamp(); clearInterval(timer); return gap; },
};
require('http').createServer((request, response) => {
  response.end(String(answers[request.url]()) + '\n');
}).listen(Number(process.argv[2]), '127.0.0.1');
