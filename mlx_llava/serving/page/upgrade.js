// The shape of what this browser keeps, and how the one before becomes it.

export function upgrade(database, transaction, oldVersion) {
  if (!oldVersion) database.createObjectStore("conversations", { keyPath: "id" });
  for (const name of ["turns", "pictures"]) {
    database.createObjectStore(name, { keyPath: "id" }).createIndex("conversation", "conversation");
  }
  if (oldVersion) divide(transaction);
}

// Version 1 had a whole conversation, pictures as data: URLs included, in one record.
function divide(transaction) {
  const all = transaction.objectStore("conversations");
  all.openCursor().onsuccess = ({ target: { result: cursor } }) => {
    if (!cursor) return;
    const { id, turns, at } = cursor.value;
    turns.forEach((turn, number) => divideTurn(transaction, id, turn, at - turns.length + number));
    const title = turns[0]?.text.slice(0, 200) || "A picture";
    cursor.update({ id, title, at, thumbnail: null });
    cursor.continue();
  };
}

function divideTurn(transaction, conversation, { text, pictures, answer }, made) {
  const id = `${conversation}-${made}`;
  const named = pictures.map((url, number) => {
    const blob = asBlob(url);
    const kind = blob.type.startsWith("video/") ? "Video" : "Picture";
    const picture = { id: `${id}-${number}`, kind, name: `${kind} ${number + 1}` };
    transaction.objectStore("pictures").put({ id: picture.id, conversation, blob });
    return picture;
  });
  const said = { text, pictures: named, answer, finish: answer ? "stop" : null };
  transaction.objectStore("turns").put({ id, conversation, made, started: made, ...said });
}

// The bytes of a data: URL, which the page's policy lets nobody fetch.
export function asBlob(url) {
  const [, type, encoding, data] = /^data:([^;,]*)[^,]*?(;base64)?,(.*)$/s.exec(url);
  const text = encoding ? atob(data) : decodeURIComponent(data);
  return new Blob([Uint8Array.from(text, (letter) => letter.charCodeAt(0))], { type });
}
