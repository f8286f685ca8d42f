// One stream of changes per visible tab. Browsers allow few connections per server, so a hidden tab gives its own up and
// catches up when it is seen again: the daemon then says `reset`, and whatever is shown is read again.

const RETRY_MS = 5000;
const NAMES = ['job', 'progress', 'vm', 'vm-removed', 'host', 'event', 'policy', 'repository', 'balance', 'reset'];

/** Follows changes with `heard(name, data)`, `told(isLive)`, `refused()`. Gives a function that ends it. */
export function follow(heard, told, refused) {
  let [source, again] = [null, null];

  function open() {
    if (source || document.hidden) return;
    source = new EventSource('/api/v1/stream');
    source.onopen = () => told(true);
    source.onerror = () => {
      told(false);
      // A refused stream is not tried again by the browser.
      if (source?.readyState === EventSource.CLOSED) {
        close();
        again = setTimeout(open, RETRY_MS);
        refused();
      }
    };
    for (const name of NAMES) source.addEventListener(name, (message) => heard(name, JSON.parse(message.data)));
  }

  function close() {
    clearTimeout(again);
    source?.close();
    source = null;
  }

  const look = () => (document.hidden ? close() : open());
  document.addEventListener('visibilitychange', look);
  open();
  return () => {
    document.removeEventListener('visibilitychange', look);
    close();
  };
}
