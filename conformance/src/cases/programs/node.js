// A server in the middle of its promises, timers and workers, with a child that answers over a pipe.
const fs = require('fs');
const { fork } = require('child_process');
const { Worker, isMainThread, parentPort } = require('worker_threads');

function fail(text) {
    fs.writeFileSync('verdict', String(text));
    process.exit(1);
}

if (!isMainThread) {
    parentPort.on('message', (number) => parentPort.postMessage([number, number * number]));
} else if (process.argv[2] === 'child') {
    process.on('message', (number) => process.send([number, number + 1]));
    process.on('disconnect', () => process.exit(0));
} else {
    process.on('uncaughtException', (error) => fail(error.stack));
    const turns = { worker: 0, child: 0, timer: 0 };
    const big = new Map();
    for (let number = 0; number < 50000; number++) {
        big.set(`key ${number}`, { number, text: 'x'.repeat(number % 50) });
    }
    const worker = new Worker(__filename);
    const child = fork(__filename, ['child']);
    worker.on('message', ([number, square]) => {
        if (number !== turns.worker || square !== number * number) fail(`the worker answered ${square} to ${turns.worker}`);
        turns.worker++;
        worker.postMessage(turns.worker);
    });
    child.on('message', ([number, next]) => {
        if (number !== turns.child || next !== number + 1) fail(`the child answered ${next} to ${turns.child}`);
        turns.child++;
        child.send(turns.child);
    });
    worker.postMessage(0);
    child.send(0);
    const timer = setInterval(() => {
        turns.timer++;
        if (turns.timer >= 20 && turns.worker > 0 && turns.child > 0 && !fs.existsSync('ready')) fs.writeFileSync('ready', '');
        if (!fs.existsSync('go')) return;
        clearInterval(timer);
        const before = { ...turns };
        // As long as it takes: the trial has an end of its own.
        const looking = setInterval(async () => {
            if (turns.worker <= before.worker || turns.child <= before.child) return;
            clearInterval(looking);
            for (const [key, { number, text }] of big) {
                if (key !== `key ${number}` || text.length !== number % 50) fail(`${key} is wrong`);
            }
            const ended = new Promise((resolve) => child.on('exit', resolve));
            child.disconnect();
            await worker.terminate();
            const code = await ended;
            if (code !== 0) fail(`the child ended with ${code}`);
            console.log(turns);
            fs.writeFileSync('verdict', 'pass');
        }, 5);
    }, 5);
}
