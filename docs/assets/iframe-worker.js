/* A page opened as a file may not start a worker, and the search of this site runs in one. Here a hidden frame takes
   its place: the same script runs in it, and messages go to and fro. Loaded from this site, so that no network is asked. */
if (location.protocol === "file:") {
  window.Worker = class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = frame.contentDocument.createElement("script")
      script.src = new URL(url, document.baseURI).href
      this.send = new Promise((resolve, reject) => {
        script.onload = () => resolve(data => inside.dispatchEvent(new MessageEvent("message", { data })))
        script.onerror = reject
      })
      frame.contentDocument.body.append(script)
    }

    postMessage(data) {
      this.send.then(send => send(data))
    }
  }
}
